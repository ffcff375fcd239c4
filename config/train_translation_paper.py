# English -> German by the choices of "Attention is all you need" (Vaswani et al. 2017), in one decoder:
#   pip install tokenizers sacrebleu; python prepare.py translation
out_dir = "out/translation_paper"
dataset = "translation"
data_order = "epoch"
gradient_accumulation_steps = 1

# 0.9M parameters: one decoder that reads the English and writes the German, its embeddings tied
n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 16
positions = "sinusoidal"
embedding_std = 128**-0.5  # the model multiplies token embeddings by sqrt(n_embd), as the paper does

max_iters = 1518  # as many as fit into the CPU seconds of config/train_translation.py
dropout = 0.1
label_smoothing = 0.1
schedule = "inverse_sqrt"
warmup_iters = 400
learning_rate = (128 * 400) ** -0.5  # n_embd^-0.5 step^-0.5, where the warm-up ends (section 5.3)
beta2 = 0.98
weight_decay = 0.0

eval_interval = 1518
eval_iters = 12
log_interval = 50
