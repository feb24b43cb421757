"""The platform's feedback database: comparisons that the serving router commits, and that ingest reads.

Any database that SQLAlchemy speaks; SQLite and PostgreSQL are meant. A vote is acknowledged when it is committed, in one
transaction with the word that its worker has changed (the outbox), from which the worker's profile is made anew.
"""

from coterie.feedback.reader import key_fingerprint, state, votes
from coterie.feedback.tables import FEEDBACK, create_schema

__all__ = ["FEEDBACK", "create_schema", "key_fingerprint", "state", "votes"]
