"""From sources to updates: row -> Pair -> ids -> packed rows -> updates, by rooms."""
