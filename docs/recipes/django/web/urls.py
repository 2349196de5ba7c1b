from django.contrib import admin
from django.urls import path
from tickets.views import tickets

urlpatterns = [path("admin/", admin.site.urls), path("tickets/", tickets)]
