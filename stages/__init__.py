"""The pipeline's steps. Each is a Hydra program over params.yaml: read, call the library, write.

    python -m stages.benchmark --help
    python -m stages.benchmark source=artifacts/ort-fp32 ... benchmark=quick      # another choice of a group
    python -m stages.benchmark source=artifacts/ort-fp32 ... -m 'benchmark.batch_sizes=[1],[8]' \
      'output=timed-${hydra:job.num}.json'                                    # each job of a sweep has its own output

params.yaml overrides conf/, the command line overrides both.
"""

import functools
import gc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, get_type_hints

try:
    import hydra
    import yaml
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Glob, Override
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
except ModuleNotFoundError as missing:
    sys.exit(
        f"error: {sys.executable} lacks {missing.name}: run `make repro`, which makes .venv with all that is needed, "
        "or `source .venv/bin/activate` first"
    )

from clip_deploy.core.artifact import MANIFEST, MANIFEST_NAME, check_files, check_prepared
from clip_deploy.core.config import GROUPS, check_key, find_choice, read_sections, sections, typed
from clip_deploy.core.errors import ConfigError, DeployError, quiet_if_unread
from clip_deploy.core.subprocesses import die_with_dvc
from clip_deploy.core.turns import turn

CONF = Path(__file__).resolve().parent.parent / "conf"
PARAMS = Path("params.yaml")
SWEEP = ("-m", "--multirun")
COLLECTED_AFTER = 100_000  # objects: PyTorch and transformers make a million that stay, and none is looked at so often
TIMED = ("benchmark", "end_to_end", "validate_triton")  # no other stage runs on this machine meanwhile
WAITS = "a stage runs on this machine that is timed alone, or this one is to be"

# Hydra writes no log and no output folder: DVC keeps the results, and the terminal is the log.
QUIET = {
    "run": {"dir": "."},
    "sweep": {"dir": ".", "subdir": "."},
    "output_subdir": None,
    "mode": None,
}
gc.set_threshold(COLLECTED_AFTER)
yaml.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))  # what --cfg job prints
HELP = (
    "${hydra.help.header}\n\nSettings (key=value overrides them; -m sweeps over a=1,2, each job with its own output:\n"
    "output=timed-$\\${hydra:job.num}.json):\n\n$CONFIG"
)


def stage(function: Callable[[Any], None]) -> Callable[[], None]:
    """Make a program of `function(settings)`.

    The type of `settings` says what the stage reads: a field named as a section of params.yaml is filled from there
    (a name under a group's key selects the group's file in conf/), every other field comes from the command line.
    """
    schema = next(iter(get_type_hints(function).values()))

    @functools.wraps(function)
    def run(content: DictConfig) -> None:
        if content.get("hydra"):
            del content["hydra"]
        settings = typed(schema, content, "settings")
        _check_target(settings)
        _check_inputs(settings)
        with turn(_name(function) in TIMED, lambda: print(f"{_name(function)} waits: {WAITS}", flush=True)):
            function(settings)

    @quiet_if_unread()
    def program() -> None:
        if "DVC_STAGE" in os.environ:
            die_with_dvc()  # else, where dvc is killed, it would write beside the stage of the next `dvc repro`
        sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in SWEEP)  # argparse takes no flag in the middle
        try:
            taken = register(function, schema)
            words = [word for word in sys.argv[1:] if "=" in word and word[0] != "-"]
            _check_words(schema, words, taken)
            if set(sys.argv[1:]) & set(SWEEP):
                _check_sweep(_name(function), words)
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=_name(function))(_reported(run))()
        except DeployError as error:
            _fail(error)

    return program


def register(function: Callable[[Any], None], schema: type) -> dict[str, Any]:
    """Store the stage's primary config: its types, the chosen groups, then what params.yaml says, which it returns."""
    name = _name(function)
    chosen = [key for key in sections(schema) if key in GROUPS]
    params, taken = read_sections(PARAMS, [key for key in sections(schema) if key not in chosen])
    store = ConfigStore.instance()
    store.store(name=f"{name}_types", node=schema)
    store.store(name=f"{name}_params", node=OmegaConf.create(taken))
    store.store(
        name=name,
        node={
            "defaults": [
                f"{name}_types",
                *({key: find_choice(CONF, key, str(params.get(key))).stem} for key in chosen),
                f"{name}_params",
                "_self_",
                {"override hydra/job_logging": "none"},
                {"override hydra/hydra_logging": "none"},
            ],
            "hydra": {**QUIET, "help": {"header": inspect.getdoc(sys.modules[function.__module__]), "template": HELP}},
        },
    )
    return taken


def _check_words(schema: type, words: list[str], taken: dict[str, Any]) -> None:
    """Raise ConfigError where the command line names a setting or a choice that there is not.

    Hydra's own message says to append it with `+`.
    """
    try:
        overrides = OverridesParser.create().parse_overrides(words)
    except HydraException:
        return  # what is wrong, hydra.main says
    for override in overrides:
        key = override.key_or_group
        if key in GROUPS and key in sections(schema):
            if override.is_add():
                raise ConfigError(f"+{key} would choose a second one: give {key}=NAME, without +")
            for choice in _choices(override):
                find_choice(CONF, key, choice)
        elif not override.is_add() and not key.startswith("hydra"):
            check_key(schema, key, taken)


def _choices(override: Override) -> list[str]:
    """Names that an override of a group gives; none where a pattern stands for them."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    return [] if isinstance(override.value(), Glob) else [str(name) for name in override.sweep_string_iterator()]


def _check_sweep(name: str, words: list[str]) -> None:
    """Raise ConfigError, before any job runs, where jobs of a sweep share an output: the last would overwrite it."""
    try:
        outputs = _outputs(name, words)
    except (HydraException, OmegaConfBaseException):
        return  # what is wrong, hydra.main says
    if len(outputs) > len(set(outputs)):
        raise ConfigError(
            f"output is {outputs[-1]} in more than one of the sweep's {len(outputs)} jobs, which would overwrite each "
            "other's result: let it vary, for example 'output=timed-${hydra:job.num}.json'"
        )


def _outputs(name: str, words: list[str]) -> list[str]:
    """Of each job of a sweep, in their order."""
    (jobs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    found = []
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for number, job in enumerate(jobs):
            content = compose(name, [*job, f"hydra.job.num={number}"], return_hydra_config=True)
            HydraConfig.instance().set_config(content)  # where ${hydra:...} looks
            found += [] if OmegaConf.is_missing(content, "output") else [str(content.output)]
    return found


def _check_target(settings: Any) -> None:
    """A stage that is run for a target has settings for it."""
    for section, targets in vars(settings).items():
        if isinstance(targets, dict) and hasattr(settings, "target") and settings.target not in targets:
            known = ", ".join(targets) or "none"
            raise ConfigError(f"target is {settings.target!r:.80}: {section} in params.yaml has {known}; add it there")


def _check_inputs(settings: Any) -> None:
    """Targets and prepared data that a stage reads must be what was built."""
    for name, value in vars(settings).items():
        if not isinstance(value, Path):
            continue
        if not value.name:
            raise ConfigError(f"{name} is {str(value)!r}: give a file or folder by its name")
        if name == "output":
            continue
        if (value / MANIFEST).is_file():
            check_files(value)
            continue
        known = [value.with_name(MANIFEST_NAME.format(value.name)), *sorted(value.glob(MANIFEST_NAME.format("*")))]
        folders = [path.with_name(path.name.removesuffix(MANIFEST_NAME.format(""))) for path in known if path.is_file()]
        for folder in folders:
            if not (folder / MANIFEST).is_file():  # of a target, validate's is older than the target may be
                check_prepared(folder)


def _name(function: Callable[[Any], None]) -> str:
    return function.__name__


def _reported(run: Callable[[DictConfig], None]) -> Callable[[DictConfig], None]:
    """Turn an error raised on purpose into one line and exit code 1; any other keeps its traceback."""

    @functools.wraps(run)
    @quiet_if_unread()  # Hydra would print a traceback
    def reported(content: DictConfig) -> None:
        try:
            run(content)
        except DeployError as error:
            _fail(error)

    return reported


def _fail(error: DeployError) -> None:
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(1)
