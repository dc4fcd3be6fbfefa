"""From a configuration to what each stage holds: blocks, costs, cuts."""
