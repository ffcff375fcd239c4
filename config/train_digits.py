# Reads handwritten digits that are drawn as characters (pip install scikit-learn; python prepare.py digits).
out_dir = "out/digits"
dataset = "digits"
sampling = "epoch"
gradient_accumulation_steps = 1

# 0.15M parameters; a row holds one image, of 64 pixels and 8 line ends
n_layer = 3
n_head = 4
n_embd = 64
block_size = 76
batch_size = 64

# 35 times through 1,450 images: so few are soon known by heart, which dropout and weight decay hinder
max_iters = 800
lr_decay_iters = max_iters
learning_rate = 2e-3
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99
dropout = 0.2
weight_decay = 0.5

eval_interval = 100
log_interval = 50
always_save_checkpoint = False  # best.pt is the one to keep
