# English -> German, trained on messages of programs and their translations:
#   pip install tokenizers sacrebleu; python prepare.py translation
out_dir = "out/translation"
dataset = "translation"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.9M parameters; a row holds about five messages with their translations
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16

# 15 passes over 1,585 rows; with more the model overfits
max_iters = 1500
learning_rate = 2e-3
min_lr = 1e-5
warmup_iters = 100
beta2 = 0.99
dropout = 0.2

eval_interval = 250
eval_iters = 50
log_interval = 50
always_save_checkpoint = False  # best.pt is the one to keep
