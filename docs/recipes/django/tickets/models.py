from django.db import models


class Ticket(models.Model):
    sender = models.TextField()
    subject = models.TextField()
    opened = models.DateTimeField(auto_now_add=True)
    closed = models.BooleanField(default=False)


class Letter(models.Model):
    ticket = models.ForeignKey(Ticket, models.CASCADE)
    text = models.TextField()
    original = models.BinaryField()
    came = models.DateTimeField(auto_now_add=True)
