"""Open a package, and work with the pipeline that made it."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from clip_deploy.core.errors import DeployError, quiet_if_unread

COMMANDS = {
    "predict": "Say which text describes an image best.",
    "embed": "Write the embeddings of images as Parquet files.",
    "index": "Make an index of what `embed` wrote, for a faster `search`.",
    "search": "Find the images that a text describes best.",
    "serve": "Answer over HTTP: embeddings, zero-shot labels and rankings.",
    "verify": "Compare a folder's files with its manifest: is it what was built and checked?",
    "drift": "Compare a sample of live embeddings with the golden set: has the input changed?",
    "publish": "Add models as the next version to a Triton repository that is served, or withdraw a version.",
    "compare": "Compare machines, or runs on one machine, in a Markdown table.",
    "sweep": "Measure a target over a grid of settings or by a search; each point is a DVC experiment.",
    "merge": "Merge a branch whose targets were built and measured there: what both sides recorded is kept.",
    "why": "Say what `dvc repro` would run, and why.",
    "gate": "Fail if a target of ci.required misses its gate, or if its result is missing or stale.",
    "apply": "Keep the nodes in FP32 that the diagnosis of a failed target names.",
    "package": "Put a target and all that a deployment needs into one folder.",
    "device": "Choose the device: write its targets and their settings into params.yaml.",
}
# Need none of the pipeline's libraries.
LIGHT = ("predict", "embed", "index", "search", "serve", "verify", "drift", "publish")
STOPPED = 130  # what shells report of Ctrl-C
EPILOG = """\
predict, embed, index, search, serve, verify, drift, publish and compare run anywhere. The others run in the project's
folder. `clip-deploy COMMAND --help` shows a command's arguments and an example.

example: clip-deploy predict photo.jpg "a photo of a dog" "a photo of a cat" --package artifacts/package

exit codes:
  0    done
  1    refused, with the reason in one line; or a check failed (gate, verify)
  2    wrong usage
  3    done, but some images could not be read (embed, search), or the samples differ (drift)
  130  stopped by Ctrl-C
  141  the reader of the output has ended, as in `clip-deploy why | head -1`
"""


@quiet_if_unread()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    chosen = next((word for word in words if not word.startswith("-")), None)
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        given = parsed(words, chosen)
        code: int = given.run(given)
        return code
    except DeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"error: {_missing(chosen, error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return STOPPED


def parsed(words: Sequence[str], chosen: str | None) -> argparse.Namespace:
    """What was given, with options also between a command's words: argparse takes those of one command by itself."""
    whole, commands = parsers(chosen)
    if chosen in commands and words[0] == chosen:
        return commands[chosen].parse_intermixed_args(words[1:])
    return whole.parse_args(words)


def parsers(chosen: str | None = None) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole, and each command: the chosen one alone is imported, as most need libraries a deployment has not."""
    whole, commands = _whole()
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == chosen:
            module = import_module(f"clip_deploy.commands.{name}")
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return whole, commands.choices


def _whole() -> tuple[argparse.ArgumentParser, "argparse._SubParsersAction[argparse.ArgumentParser]"]:
    layout = argparse.RawDescriptionHelpFormatter
    whole = argparse.ArgumentParser("clip-deploy", description=__doc__, epilog=EPILOG, formatter_class=layout)
    whole.add_argument("--version", action="version", version=f"%(prog)s {_version()}", help="show it and exit")
    return whole, whole.add_subparsers(required=True, metavar="COMMAND")


def _version() -> str:
    try:
        return version("clip-deploy")
    except PackageNotFoundError:
        return "of a folder that is not installed"


def _missing(command: str | None, error: ModuleNotFoundError) -> str:
    """What to install; a module of our own that is not there is a mistake of ours, with its traceback."""
    if error.name is None or error.name.split(".")[0] == "clip_deploy":
        raise error
    install = "clip-deploy" if command in LIGHT else "'clip-deploy[pipeline]'"
    return f"{command} needs {error.name}, which is not installed: pip install {install}"


if __name__ == "__main__":
    sys.exit(main())
