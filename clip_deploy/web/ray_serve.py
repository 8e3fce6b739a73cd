"""The same application in replicas of Ray Serve: serve run clip_deploy.web.ray_serve:app packages=artifacts/package

Ray spreads requests over replicas and replaces one that dies. Requests that it had not answered are then answered by
Ray's proxy, with 500 in plain text: their clients ask again, which changes no answer.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError
from ray import serve
from ray.serve.exceptions import RayServeException

from clip_deploy.core.errors import DataError, DeployError
from clip_deploy.core.package import Package, read_package
from clip_deploy.inference.classifier import DEVICES, FEEDS
from clip_deploy.web.app import RETRY_S, App, create_app
from clip_deploy.web.hosts import NamedHosts, check_hosts
from clip_deploy.web.keys import Keys, warn_if_readable
from clip_deploy.web.models import check_folder, parsed
from clip_deploy.web.settings import Settings

RAYS_OWN = ("host", "port", "workers", "drain_s")  # of Settings: Ray listens, has replicas and drains them
LISTS = ("packages", "allow_hosts", "image_hosts")  # one of them may be given as a string
PATHS = ("api_key_file", "index", "images")
ACCEPTED = {"device": (None, *DEVICES), "feed": FEEDS}
ONGOING = 128  # requests of a replica at a time: it makes batches of them, and its queue's bound holds
QUEUED = 1_024  # that wait in each of Ray's proxies until a replica has room; what comes beyond is refused with 429


class RefusedError(click.ClickException, RayServeException):  # type: ignore[misc]
    """Its message is shown alone: by `serve run` for the one class, where a file is deployed for the other."""


class Ingress(NamedHosts):
    """The application behind the check of hosts, with the routes by which Ray counts requests."""

    def __init__(self, app: App, names: tuple[str, ...]) -> None:
        super().__init__(app, names, app.observe)
        self.routes, self.router = app.routes, app.router


class Replica:
    """A replica of Ray Serve with an application of its own."""

    async def check_health(self) -> None:
        """Ray calls it on the event loop that answers: a replica in which that hangs is replaced."""


def app(arguments: dict[str, Any]) -> serve.Application:
    """Ray Serve's application, whose one deployment is `clip-deploy`.

    A replica takes as many CPUs as its towers have threads (1 unless `threads` says otherwise) and, for a device of
    cuda, a GPU. The packages' folders are on every machine of the cluster.

    Args:
        arguments: of Settings, but for RAYS_OWN; numbers may be strings, as the command line gives them.

    Raises RefusedError where an argument or a package will not do.
    """
    try:
        settings = _settings(arguments)
        keys, packages = Keys(settings.api_key_file), [_package(given) for given in settings.packages]
    except DeployError as error:
        raise RefusedError(str(error)) from None
    devices = {settings.device or package.encoder.device for package in packages}

    def build() -> App | Ingress:
        made = _opened(settings, keys, packages)
        return made if settings.api_key_file else Ingress(made, settings.allow_hosts)

    deployment = serve.deployment(
        name="clip-deploy",
        ray_actor_options={"num_cpus": settings.threads, "num_gpus": int("cuda" in devices)},
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        backpressure_config={"status_code": 429, "retry_after_s": RETRY_S},
        graceful_shutdown_timeout_s=settings.timeout_s,
    )
    return deployment(serve.ingress(build)(Replica)).bind()


def _opened(settings: Settings, keys: Keys, packages: list[Package]) -> App:
    """A replica's application, also of one that begins later or on another machine: it answers as all others do.

    Raises DeployError where a package's folder holds another than when it was deployed, or as create_app does.
    """
    made = create_app(settings, keys)
    for served, package in zip(made.state.api.models.served, packages, strict=True):
        if served.classifier.package != package:
            raise DeployError(
                f"{served.id}: its folder holds another package than when it was deployed, and this replica would "
                "answer otherwise than the others: deploy it again"
            )
    return made


def _settings(given: dict[str, Any]) -> Settings:
    """Raises DataError where there is no such argument, or its value will not do."""
    known = [name for name in Settings.__dataclass_fields__ if name not in RAYS_OWN]
    if unknown := [name for name in given if name not in known]:
        raise DataError(f"{', '.join(unknown)} is not an argument: accepted are {', '.join(known)}")
    values = {name: [value] if name in LISTS and isinstance(value, str) else value for name, value in given.items()}
    try:
        settings = TypeAdapter(Settings).validate_python(values)
    except ValidationError as error:
        fault = error.errors()[0]
        raise DataError(f"{'.'.join(map(str, fault['loc']))} is {fault['input']!r}: {fault['msg']}") from error
    for name, accepted in ACCEPTED.items():
        if (value := getattr(settings, name)) not in accepted:
            raise DataError(f"{name} is {value!r}: accepted are {', '.join(filter(None, accepted))}")
    check_hosts("allow_hosts", settings.allow_hosts)
    check_hosts("image_hosts", settings.image_hosts)
    if settings.api_key_file:
        warn_if_readable(settings.api_key_file)
    paths = {name: path.absolute() for name in PATHS if (path := getattr(settings, name))}
    return replace(settings, packages=tuple(map(_absolute, settings.packages)), threads=settings.threads or 1, **paths)


def _absolute(package: str) -> str:
    """A replica's working folder is another one."""
    folder = parsed(package)[2]
    return package.removesuffix(folder) + str(Path(folder).absolute())


def _package(given: str) -> Package:
    """Its manifest. Raises DeployError where the folder holds no whole package."""
    folder = parsed(given)[2]
    check_folder(folder)
    return read_package(Path(folder))
