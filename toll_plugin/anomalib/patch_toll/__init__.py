"""PatchToll, on the features of a pretrained backbone."""
