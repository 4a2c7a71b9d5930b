"""What AdamW's kernels in Triton (`adamw.py`) and in CUDA C++ (`adamw_cuda.py`) agree on: the size of a block, and what the numbers in the
device's tables mean. Both give the places in a table the names below.
"""

import torch

BLOCK_ELEMENTS = 8192
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 2.0**24  # of the dynamic loss scale

# A row of the table, int64, for each tensor; PARAM is 0 where its gradient is measured and the tensor left alone:
FIELDS = ("PARAM", "AVG", "AVG_SQ", "HALF", "SIZE", "FIRST_BLOCK", "DECAY", "HALF_KIND")  # addresses; the decay's float64 bits
# (address, kind) of each gradient, a table of its own because it changes:
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
HYPER = ("LEARNING_RATE", "BETA1", "BETA2", "EPS", "MAX_NORM", "LOSS_SCALE_INVERSE", "SKIP_NONFINITE", "GROWTH_INTERVAL")
STATE = ("UPDATES", "LOSS_SCALE", "GOOD_STEPS", "SKIPPED")
# float64, from `finish` to `update`; the last two are schedule-free AdamW's own:
COEFFICIENTS = ("GRAD_SCALE", "RATE", "STEP_SIZE", "ROOT", "KEEP1", "KEEP2", "EPSILON", "SKIP", "SHARE", "DIRECT")
