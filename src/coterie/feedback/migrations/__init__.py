"""Alembic's migrations of the feedback database; in the package, so that every image carries them."""
