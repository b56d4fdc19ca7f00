"""Accrual's SDK: record what your models predicted and what really happened, and be handed the champion.

    from accrual import ModelFeed, Recorder

    feed, recorder = ModelFeed("support-intents"), Recorder("support-intents")
    champion = feed.champion()
    [output] = champion.predict([{"text": "Where is my card?"}])
    prediction_id = recorder.predict({"text": "Where is my card?"}, output, model=champion.model)
    recorder.outcome(prediction_id, {"intent": "card_arrival"})  # days later, from anywhere

Importing this loads neither torch nor faust nor duckdb; torch comes with the first champion.
"""

from accrual.config import Config, load_config
from accrual.errors import (
    AccrualError,
    BrokerUnavailable,
    BufferFull,
    BundleError,
    ConfigError,
    NoChampion,
    RecorderClosed,
    Rejected,
    Terminal,
    Transient,
)
from accrual.events import Distribution, new_prediction_id
from accrual.feed import Challenger, Champion, ModelFeed
from accrual.recorder import AsyncRecorder, Recorder, Undelivered

__all__ = [
    "AccrualError",
    "AsyncRecorder",
    "BrokerUnavailable",
    "BufferFull",
    "BundleError",
    "Challenger",
    "Champion",
    "Config",
    "ConfigError",
    "Distribution",
    "ModelFeed",
    "NoChampion",
    "Recorder",
    "RecorderClosed",
    "Rejected",
    "Terminal",
    "Transient",
    "Undelivered",
    "load_config",
    "new_prediction_id",
]
