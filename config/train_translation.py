# English -> German, trained on messages of programs and their translations:
#   pip install tokenizers sacrebleu; python prepare.py translation
out_dir = "out/translation"
dataset = "translation"
data_order = "epoch"
gradient_accumulation_steps = 1

# 1.1M parameters; a row holds about five messages with their translations
n_layer = 4
n_head = 4
n_embd = 128
n_inner = 344
block_size = 128
batch_size = 16
norm = "rmsnorm"
positions = "rotary"
qk_norm = True
activation = "swiglu"
bias = False
tied_head = False
zero_projections = True
embedding_std = 0.1

# 13 passes over 1,585 rows
max_iters = 1300
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

eval_interval = 325
eval_iters = 12
log_interval = 50
