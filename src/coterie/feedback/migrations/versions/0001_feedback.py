"""Votes, the outbox, the stamps of profiles, and which votes a mixture was made of."""

import sqlalchemy as sa
from alembic import op

from coterie.feedback.tables import Moment

revision, down_revision = "0001", None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "feedback",
        sa.Column("comparison_id", sa.Text, primary_key=True),
        *(
            sa.Column(name, sa.Text, nullable=False)
            for name in ("worker_id", "prompt", "prompt_id", "chosen", "rejected")
        ),
        *(sa.Column(name, sa.Text, nullable=False) for name in ("chosen_id", "rejected_id", "pair_id")),
        sa.Column("label", sa.Float, nullable=False),
        sa.Column("ranking_id", sa.Text),
        sa.Column("shown_first", sa.Text),
        sa.Column("confidence", sa.Float),
        sa.Column("source", sa.Text, nullable=False),
        sa.Column("created_at", Moment, nullable=False),
        sa.Column("key_fingerprint", sa.Text, nullable=False),
        sa.Column("counts", sa.Boolean, nullable=False),
        sa.Column("request_id", sa.Text),
        sa.Column("arm", sa.Text),
        sa.Column("propensity", sa.Float),
        sa.Column("agreed", sa.Float),
    )
    op.create_index("feedback_in_order", "feedback", ["created_at", "comparison_id"])
    op.create_index("feedback_by_worker", "feedback", ["worker_id", "created_at"])
    op.create_table(
        "outbox",
        sa.Column(
            "sequence", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True
        ),
        sa.Column("worker_id", sa.Text, nullable=False),
        sa.Column("created_at", Moment, nullable=False),
    )
    op.create_index("outbox_by_worker", "outbox", ["worker_id"])
    op.create_table(
        "stamp",
        sa.Column("worker_id", sa.Text, primary_key=True),
        sa.Column("stamped_at", Moment, nullable=False),
        sa.Column("publication", sa.Text, nullable=False),
    )
    op.create_table(
        "folded",
        sa.Column("folding", sa.Text, primary_key=True),
        sa.Column("comparison_id", sa.Text, primary_key=True),
    )


def downgrade() -> None:
    """Drop the tables."""
    for name in ("folded", "stamp", "outbox", "feedback"):
        op.drop_table(name)
