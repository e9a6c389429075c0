"""Whether a concept has learned too little, enough or too much: measured, charted, and said in words."""
