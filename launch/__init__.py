"""Everything that starts something: the `selfsight` command and what its verbs need."""
