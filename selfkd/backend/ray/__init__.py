"""Ray: engines and ranks as actors, who does what next, and what happens when one dies. The only folder that imports Ray."""
