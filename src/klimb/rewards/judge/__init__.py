"""Models that judge: a server that speaks OpenAI's chat completions, or a model on this machine, as a reward and as an
annotator of comparisons. `settings.py` says what there is to set, `question.py` what a judge is asked.
"""
