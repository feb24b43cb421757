"""The platform's feedback database: comparisons that the serving router commits, and that ingest reads.

Any database that SQLAlchemy speaks; SQLite and PostgreSQL are meant. A vote is acknowledged when it is committed, in one
transaction with the word that its worker has changed (the outbox), from which the worker's profile is made anew.

Nothing is imported here: the predictor makes posteriors with feedback, and its image holds no SQLAlchemy.
"""
