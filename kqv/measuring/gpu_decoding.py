def measure_decoding(job):
    pass
