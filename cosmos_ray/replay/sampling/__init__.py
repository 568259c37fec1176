"""From stored episodes to training windows: selection, drawing, decoding, pacing."""
