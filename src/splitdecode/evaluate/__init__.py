"""F7: one harness and one scorer for every policy.

tasks       what is asked: synthetic families, JSON lines, data sets of the hub
scorers     what counts as right                    policies     who writes where: the rows of a table
pair        the models                              runs         answers, and what they cost
intervals   how sure a figure is                    decisions    hand-offs against labels
report      a results document                      tables       that document for people; pareto: as plots
lm_harness  lm-evaluation-harness drives a pair     likelihood   log-probabilities of given ids
command     `splitdecode eval`                      claims       `splitdecode claims`
"""
