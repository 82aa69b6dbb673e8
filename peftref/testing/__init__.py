"""What proves new entries and techniques: strategies of random compositions, contract suites.

Needs ``hypothesis`` and ``pytest``; imported by tests only.
"""
