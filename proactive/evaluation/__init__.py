"""Parts of `proactive.evaluate`: the test of a reward classifier, and the evaluation of agents.

- evaluation_options: the options of both
- reward_evaluation: the test
- agent_command: what the evaluation of an agent prints
- prepare, specification: turn options into a checked `Evaluation`, with models and data loaded
- carry_out: asks the agents, then the judges, and writes the folder
- judged_events, evaluation_notes: metrics, and what a reader must know about them
- evaluation_report, published_layouts: the page, and files in the layouts of ProactiveBench
"""
