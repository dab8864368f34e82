"""The errors a user or a remote peer can cause.

Every message says what was expected, what arrived, from where, and what to do. They all
derive from HoslError, so an entry point catches one class and prints one line.
"""

IN_THE_LOG = "the reason is in the log of this client"


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


MOST_TOLD = 500  # characters of another machine's own words that are kept; our own messages fit


def printable(text: str, most: int = 0) -> str:
    """Text from another machine as one harmless line: what is not printable (control characters,
    line ends, marks that change the direction of text) is escaped, and what is beyond `most`
    characters is left out; 0 is no bound."""
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in (text[: most + 1] if most else text)
    )
    return f"{shown[:most]}..." if most and len(shown) > most else shown


class HoslError(Exception):
    """Base of every error this package raises on purpose.

    public: the text that may leave the device where the error is raised, see `public_reason`. Where
    `is_public` is true that is the whole message.
    """

    is_public = False  # the message quotes nothing but what the peer has sent or may know

    def __init__(self, message: object = "", *, public: str = ""):
        super().__init__(message)
        self.public = str(message) if self.is_public else public


def public_reason(error: BaseException) -> str:
    """The text about an error that may leave a device: no contents of files, no values of examples
    and no paths. An error that has no public text leaves as its kind alone."""
    text = error.public if isinstance(error, HoslError) else ""
    return f"{type(error).__name__}: {text or IN_THE_LOG}"


class ConfigError(HoslError):
    """A run-config key is unknown, malformed, out of range or contradicts another."""


class RefusedError(ConfigError):
    """A run asks for something that this device does not allow or does not have. The message holds
    the request and the key that allows it, and nothing else of the device."""

    is_public = True


class DataError(HoslError):
    """A data set cannot be found, read, or does not have what the task needs."""


class ModelError(HoslError):
    """A model directory or weight file is missing, damaged or of another model."""


class CheckpointError(HoslError):
    """A run directory or a checkpoint in it is missing, damaged or of another run."""


class PeerError(HoslError):
    """Base of errors whose message may quote another machine: one line, see `printable`."""

    def __init__(self, message: str, *, public: str = ""):
        super().__init__(printable(message), public=public)


class ProtocolError(PeerError):
    """A message does not have the form the protocol asks for."""

    is_public = True


class OutOfRangeError(ProtocolError):
    """Numbers in a message are not finite or absurdly large: a bad client or, when it is every
    client, training that has diverged."""


class ClientError(PeerError):
    """A client failed, did not answer in time, or answered with an error."""


class AbsentError(ClientError):
    """A client is not connected or does not answer: it may be there later."""


class SuperLinkError(HoslError):
    """SuperLink does not answer any more."""


class LostClientsError(ClientError):
    """Clients that failed in the middle of a step.

    errors: by their place among its mini-batches.
    """

    def __init__(self, errors: dict[int, HoslError]):
        super().__init__("; ".join(map(str, errors.values())))
        self.errors = errors


class DriftError(PeerError):
    """A client submodel is not the one its ledger describes."""

    is_public = True


class DivergedError(HoslError):
    """Training left the finite numbers."""


class UnusableBatchError(DivergedError):
    """Some of the mini-batches given together lead out of the finite numbers.

    reasons: why, by their place; empty where it cannot be told which.
    """

    def __init__(self, message: str, reasons: dict[int, str]):
        super().__init__(message)
        self.reasons = reasons
