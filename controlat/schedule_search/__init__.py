"""The search for a schedule: proposers ask for schedules, a judge trains under them and tells J."""
