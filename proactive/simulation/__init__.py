"""Simulated sessions. Only `proactive.simulate` and the export of live sessions use these modules.

- scenes_command, seed_tasks, scene_writing, scripted_writer: `simulate scenes`: scenes from seed tasks
- scenes, contamination: the scenes that sessions start from, without events of test traces
- questions, asking: questions to roles, and asking until an answer is valid
- role_options, scripted_roles, endpoint_roles, local_roles: the roles
- session_loop, trace_simulation, concurrent_work, work_items: `simulate traces`: sessions, concurrently
- simulation_log: every question and answer, so that a stopped simulation can continue
- simulated_traces, training_data, simulation_summary, simulation_report: the files that are derived
"""
