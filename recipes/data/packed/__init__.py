"""Token ids -> packed rows -> updates."""
