"""What the stages' index pages are made of. Each page is one file that needs nothing but the
folder that it lies in: no script, no font, no picture from outside."""
