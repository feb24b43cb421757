"""The online path on KServe: a router that knows people, a predictor that scores texts."""
