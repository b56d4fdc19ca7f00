"""The one error tree of Accrual.

AccrualError
├── Terminal                a retry will not help; the message names the fix
│   ├── ConfigError         accrual.toml or an ACCRUAL_* variable
│   ├── ContractError       a contract file: field, problem and fix
│   ├── TopicMismatch       topics on the broker do not fit what a stage needs
│   ├── ChangelogLost       records of the join's changelog are gone: its state cannot be known
│   ├── LedgerLost          the ledger knows no model of a stream that the lake knows models of
│   ├── BrokerSetupError    the development broker cannot be set up or started
│   ├── LakeLocked          another process holds the lake's writer lock
│   ├── LakeError           the lake refused a statement
│   ├── BundleError         a model bundle is broken, altered or not signed
│   ├── SigningKeyError     a signing key is missing or cannot be used
│   ├── AuditRecordError    an audit record is missing, altered or not signed
│   ├── Rejected            an event breaks its contract (becomes a dead letter)
│   ├── RecorderClosed      an event was given to a recorder after its close
│   ├── TrainingFailed      a training run cannot give a model; a recorded result, not a crash
│   ├── WorkerFailed        a supervised process keeps dying
│   ├── NotFound            what a command was asked for is not there
│   └── NotHere             a command needs a part that is not installed
└── Transient               the same call may succeed later
    ├── BrokerUnavailable   no broker answers, or it timed out
    ├── BufferFull          the recorder's local buffer is full
    ├── RegistryUnavailable no Schema Registry answers at `registry.url`
    ├── NoChampion          no generation of the stream has been published and loaded yet
    ├── StoreUnavailable    the model store, or the trainer's temporary file, cannot be written: the disk is full
    └── LakeUnavailable     catalog or data store out of reach, or busy
        └── LakeConflict    another writer's transaction came first
"""


class AccrualError(Exception):
    """Root of everything Accrual raises on purpose."""


class Terminal(AccrualError):
    """A retry will not heal it; a person or a change of input will."""


class Transient(AccrualError):
    """The same call may succeed later."""


class ConfigError(Terminal):
    """A setting is missing or wrong; the message names it and the fix."""


class ContractError(Terminal):
    """A contract is wrong; the message names file, field, problem and fix."""


class TopicMismatch(Terminal):
    """The broker's topics do not fit (missing, or differing partition counts)."""


class ChangelogLost(Terminal):
    """The join's changelog was emptied, cut short or recreated: pending predictions are gone from it."""


class LedgerLost(Terminal):
    """The topics know no model of a stream, and the lake does: to begin anew would put generation 0 into service."""


class BrokerSetupError(Terminal):
    """The development broker cannot be set up, started or stopped."""


class LakeLocked(Terminal):
    """Another process is the lake's one writer."""


class LakeError(Terminal):
    """The lake refused a statement; the message carries the engine's reason."""


class BundleError(Terminal):
    """A model bundle is incomplete, altered, or its signature does not verify."""


class SigningKeyError(Terminal):
    """A signing key, or its public half, is missing or cannot be used."""


class AuditRecordError(Terminal):
    """An audit record is missing or altered, or its signature does not verify."""


class NotFound(Terminal):
    """What a command was asked for is not there; the message says where to look."""


class NotHere(Terminal):
    """A command needs a part of Accrual that is not installed here."""


class Rejected(Terminal):
    """An event breaks its contract.

    `reason` is one of `accrual.events.REASONS`; `detail` says what and where, for a person.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class RecorderClosed(Terminal):
    """The recorder was closed; make a new one."""


class TrainingFailed(Terminal):
    """A training run cannot give a model; the message says why. The trainer records it and goes on."""


class WorkerFailed(Terminal):
    """A supervised process keeps dying; the message carries the last lines of its log."""


class BrokerUnavailable(Transient):
    """No broker answers at `kafka.bootstrap_servers`, or a request timed out."""


class BufferFull(Transient):
    """The recorder's local buffer is full and its policy is `raise`."""


class NoChampion(Transient):
    """No generation of the stream has been published and loaded yet."""


class StoreUnavailable(Transient):
    """The model store, or the trainer's temporary file, cannot be written: a disk full, over its quota, read-only."""


class RegistryUnavailable(Transient):
    """No Schema Registry answers at `registry.url`, or it fails."""


class LakeUnavailable(Transient):
    """The lake's catalog or data store cannot be reached, or is busy."""


class LakeConflict(LakeUnavailable):
    """Another writer's transaction came first and touched the same; nothing of this one is in the lake."""
