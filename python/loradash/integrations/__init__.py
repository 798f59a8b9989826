"""Other people's frameworks, a file for each. One that needs its framework imports it inside its functions."""
