"""What pictures of tokens are made of: places in the image, tints of patches, attention between pairs of patches."""
