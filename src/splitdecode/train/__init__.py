"""F7: teaching the small model when to hand over.

rewards   what an answer is worth: accuracy, format, tag_count, latency   cost   what it takes, by its spans
traces    tagged solutions as ids and labels          settings   a run's numbers: presets, flags, checks
sft       supervised fine-tuning on tagged traces     export     a directory that the runtime can load
objective the log-probability of an answer, act by act, and the loss over it       grpo   with the pair's own rollouts
grpo_run  one GRPO run, from settings to a directory     grpo_settings   its numbers
output    whose a directory is, where a run goes on
muon      Muon and AdamW as one optimiser              log_plot  the logs of GRPO runs as a picture
ablate    annotation x SFT x RL: the stages            ablate_plan, ablate_report   what is asked, what came out
command   `splitdecode train`
"""
