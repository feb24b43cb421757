"""Worker profiles in Feast: definitions derived from the contracts, publication, lookups."""
