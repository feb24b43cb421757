"""The Helm chart, and what its README is made by."""
