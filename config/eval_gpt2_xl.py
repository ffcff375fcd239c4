# Evaluate OpenAI's GPT-2 (1558M parameters) on a prepared set, OpenWebText if no other is named.
init_from = "gpt2-xl"
batch_size = 8
eval_iters = 500
eval_only = True
wandb_log = False
