"""Prometheus metrics of router and predictor (docs/serving.md), beside KServe's own histograms."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

REQUESTS = Counter("coterie_requests", "Requests to a model, by what became of them", ["model", "cause"])
RESPONSES = Counter("coterie_http_responses", "Answers over HTTP but those to probes and scrapers", ["status"])
# Router. The share of strangers is fallbacks{reason="unknown-worker"} in answers.
ANSWERS = Counter("coterie_answers", "Instances answered, by whose reward served", ["source"])
FALLBACKS = Counter("coterie_fallbacks", "Instances scored by the global reward, by reason", ["reason"])
ENTROPY = Histogram("coterie_posterior_entropy", "Of served posteriors, as a share of the largest", buckets=_SHARES)
PROFILES = Counter("coterie_profiles", "Workers asked for, by where their profiles were found", ["where"])
LOOKUPS = Counter("coterie_profile_lookups", "Lookups in the profile store, by what became of them", ["cause"])
LOOKUP_SECONDS = Histogram("coterie_profile_lookup_seconds", "Of a lookup in the profile store", buckets=_SECONDS)
PAUSED = Gauge("coterie_profile_store_paused", "1 while the profile store is left alone because lookups fail")
# Predictor.
BATCH = Histogram("coterie_batch_texts", "Texts scored together", buckets=_TEXTS)
WAITING = Gauge("coterie_queue_texts", "Texts that wait to be scored")
WAITED = Histogram("coterie_queue_seconds", "How long a question waited before it was scored", buckets=_SECONDS)
SWITCHES = Counter("coterie_bundle_switches", "Bundles loaded while serving, by what became of them", ["cause"])
