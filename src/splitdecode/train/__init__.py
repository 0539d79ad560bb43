"""F7: teaching the small model when to hand over.

rewards   what an answer is worth: accuracy, format, tag_count, latency
traces    tagged solutions as ids and labels          settings   a run's numbers: presets, flags, checks
sft       supervised fine-tuning on tagged traces     export     a directory that the runtime can load
command   `splitdecode train`
"""
