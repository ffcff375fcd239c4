# Evaluate OpenAI's GPT-2 (774M parameters) on a prepared set, OpenWebText if no other is named.
init_from = "gpt2-large"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
