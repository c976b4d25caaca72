"""Token names and sentinels, with LLaVA's names and values."""

IGNORE_INDEX = -100  # label of positions that carry no loss
IMAGE_TOKEN_INDEX = -200  # stands for an image in input_ids; never in the vocabulary
DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"  # in queries: replaced by <image>
