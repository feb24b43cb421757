"""Feast's view of a worker profile, derived from contracts.PROFILE field by field.

Importing this module imports feast, which takes about ten seconds: import it late.
"""

from __future__ import annotations

import pyarrow as pa
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Array, FeastType, Float32, Int32, String

from coterie import contracts
from coterie.routing import MAX_AGE

JOIN_KEY, TIMESTAMP = "worker_id", "event_timestamp"
PROFILES_FILE = "profiles.parquet"


def _feast_type(kind: pa.DataType) -> FeastType:
    if pa.types.is_list(kind):
        return Array(_feast_type(kind.value_type))
    return {pa.string(): String, pa.float32(): Float32, pa.int32(): Int32}[kind]


worker = Entity(
    name="worker",
    join_keys=[JOIN_KEY],
    value_type=ValueType.STRING,
    description="An annotator or user, by the pseudonym that ingest made",
)
# The path is relative to the folder that holds the registry, so that a published folder can be moved.
profiles = FileSource(name="profiles", path=PROFILES_FILE, timestamp_field=TIMESTAMP)
worker_profile = FeatureView(
    name="worker_profile",
    entities=[worker],
    ttl=MAX_AGE,
    schema=[
        Field(name=field.name, dtype=_feast_type(field.type))
        for field in contracts.PROFILE.fields
        if field.name != TIMESTAMP
    ],
    source=profiles,
    description="Where a worker stands: embedding, coterie, posterior, and the mixture that they belong to",
)
FEATURES = [field.name for field in worker_profile.features]
