"""What a client is told instead of an answer, in the shape of OpenAI's errors."""

from http import HTTPStatus

KINDS = {401: "authentication_error", 429: "rate_limit_error"}  # OpenAI's `type`, beside the two of `kind`


class RequestError(Exception):
    """A request that gets no answer, and why."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        """
        Args:
            status: of HTTP.
            param: the field of the body at fault.
            code: a word for programs; without one, that of the status.
            retry_after_s: when to try again.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after_s = status, message, param, retry_after_s
        self.code = code or HTTPStatus(status).phrase.lower().replace(" ", "_")

    @property
    def kind(self) -> str:
        return KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, object]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}


def bad(message: str, param: str | None = None, code: str | None = None) -> RequestError:
    """A mistake in the request."""
    return RequestError(400, message, param, code)
