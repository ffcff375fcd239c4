def check_kernels(job):
    pass
