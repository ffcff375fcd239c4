# Handwritten digits, drawn in characters -> the digit:
#   pip install scikit-learn; python prepare.py digits
out_dir = "out/digits"
dataset = "digits"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.15M parameters; a row holds one image, of 4 lines of 8 characters
n_layer = 3
n_head = 4
n_embd = 64
n_inner = 172
block_size = 40
batch_size = 32
norm = "rmsnorm"
qk_norm = True
activation = "swiglu"
bias = False
tied_head = False
zero_projections = True
embedding_std = 0.1
# positions stay learned: a pixel has a place in the image, and two places have no order

# 33 passes over 1,427 images; so few are soon known by heart, without dropout and smoothed labels
max_iters = 1500
dropout = 0.2
label_smoothing = 0.1
optimizer = "muon"
learning_rate = 8e-3
embedding_learning_rate = 2e-2
beta1 = 0.8
weight_decay = 0.0
schedule = "wsd"
warmup_iters = 0
cooldown_iters = 0.7
min_lr = 1.6e-4

eval_interval = 1500  # only at the end: the validation images choose nothing
log_interval = 50
