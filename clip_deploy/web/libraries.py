"""The extra `serve`: what of it is missing here."""

from importlib.util import find_spec

from clip_deploy.core.errors import UnavailableError

LIBRARIES = ("starlette", "uvicorn", "httptools", "orjson", "prometheus_client")


def check_libraries() -> None:
    """Raises UnavailableError naming those that are missing, with the way out."""
    if missing := [name for name in LIBRARIES if find_spec(name) is None]:
        raise UnavailableError(f"serve needs {', '.join(missing)}: pip install 'clip-deploy[serve]'")
