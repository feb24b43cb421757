"""The image that the components run in.

The compiled pipeline holds this name in place of an image. Whoever uploads it puts in an image of containers/Dockerfile,
target `train`, by digest: Kubeflow's cache key is the name, so that a tag would serve stale results.
"""

TRAIN_IMAGE = "coterie-train:unset"
