"""The audit: what a private method claims against what is found when its own rounds are run. `suite` runs all of it.

Nothing here is on the path of a run, and nothing here changes one.
"""
