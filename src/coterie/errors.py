"""The exception types. Every message says what is wrong, where, and the remedy."""


class CoterieError(Exception):
    """Base of every error that coterie raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 3


class BadData(CoterieError):
    """The input data cannot be used: wrong columns, no rows, too many refused rows, a schema that is not known."""

    exit_code = 2


class BadConfiguration(CoterieError):
    """A setting, a recipe, a key or a command line argument is wrong or missing."""

    exit_code = 2


class BadBundle(CoterieError):
    """A bundle is incomplete, damaged, or of a schema that this version does not read."""

    exit_code = 2


class RunFailed(CoterieError):
    """The input was good and the work still failed: a full disk, an estimator that diverged, a failed stage."""


class BackendUnavailable(CoterieError):
    """Something that this program talks to does not answer: an object store, Feast, a Kubeflow API."""


class StorageFull(BackendUnavailable):
    """A database has no room for what it was given."""


class Conflict(CoterieError):
    """What was sent contradicts what is stored under the same id."""

    exit_code = 2
