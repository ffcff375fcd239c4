# Handwritten digits, drawn in characters -> the digit:
#   pip install scikit-learn; python prepare.py digits
out_dir = "out/digits"
dataset = "digits"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.6M parameters; a row holds one image, of 4 lines of 8 characters
n_layer = 3
n_head = 4
n_embd = 128
block_size = 40
batch_size = 32

# 67 passes over 1,427 images; dropout and weight decay are high, since so few images are soon overfitted
max_iters = 3000
learning_rate = 1.5e-3
min_lr = 1e-5
warmup_iters = 50
beta2 = 0.99
dropout = 0.3
weight_decay = 1.0

eval_interval = 250
log_interval = 50
always_save_checkpoint = False  # best.pt is the one to keep
