{{/* Labels of everything; the component is the second argument: (list $ "redis"). */}}
{{- define "coterie.labels" -}}
{{- $root := index . 0 -}}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
app.kubernetes.io/part-of: coterie
{{ include "coterie.selector" . }}
{{- end }}

{{/* Labels that pods are found by. */}}
{{- define "coterie.selector" -}}
app.kubernetes.io/name: coterie
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Name of what lies in pipelines.namespace, where releases of several namespaces meet. */}}
{{- define "coterie.pipelineName" -}}
{{ printf "%s-%s-pipeline" .Release.Namespace .Release.Name }}
{{- end }}

{{/* Names of the Secrets of router and stores: those of the chart, or existing ones. */}}
{{- define "coterie.pseudonymSecret" -}}
{{ .Values.pseudonym.existingSecret | default (printf "%s-pseudonym" .Release.Name) }}
{{- end }}
{{- define "coterie.storesSecret" -}}
{{ .Values.stores.existingSecret | default (printf "%s-stores" .Release.Name) }}
{{- end }}
{{- define "coterie.s3Secret" -}}
{{ .Values.s3.existingSecret | default (printf "%s-s3" .Release.Name) }}
{{- end }}
{{- define "coterie.tokenSecret" -}}
{{ .Values.token.existingSecret | default (printf "%s-token" .Release.Name) }}
{{- end }}

{{/* Feast's connection string of Redis but the password; empty: profiles lie in SQLite. */}}
{{- define "coterie.redis" -}}
{{- if .Values.redis.enabled -}}
{{ printf "%s-redis.%s:6379" .Release.Name .Release.Namespace }}
{{- else -}}
{{ .Values.redis.connection }}
{{- end -}}
{{- end }}

{{/* URL of the feedback database but the password; empty: no feedback is taken. */}}
{{- define "coterie.database" -}}
{{- if not .Values.feedback.enabled -}}
{{- else if .Values.feedback.database -}}
{{ .Values.feedback.database }}
{{- else if .Values.postgresql.enabled -}}
{{ printf "postgresql+psycopg://coterie@%s-postgresql.%s:5432/coterie" .Release.Name .Release.Namespace }}
{{- end -}}
{{- end }}
