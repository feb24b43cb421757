{{/*
The InferenceService. The deploy step (serving/deploy.py) fills in which bundle and profiles, and applies it; nothing else
writes it. The server's own defaults are given where KServe has others.
*/}}
{{- define "coterie.inferenceService" -}}
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {{ .Release.Name }}
  namespace: {{ .Release.Namespace }}
  labels:
    app.kubernetes.io/name: coterie
    app.kubernetes.io/instance: {{ .Release.Name }}
    app.kubernetes.io/part-of: coterie
  annotations:
    serving.kserve.io/deploymentMode: Standard
    coterie.dev/bundle: ""
    coterie.dev/model-version: ""
    coterie.dev/profiles: ""
spec:
  predictor:
    {{- include "coterie.component" (list . "predictor") | nindent 4 }}
    initContainers:
      - name: fetch
        image: {{ .Values.images.predictor }}
        imagePullPolicy: IfNotPresent
        command: [python3, -m, serving.fetch, bundle]
        env:
          - {name: COTERIE_BUNDLE, value: ""}
          - {name: COTERIE_MODEL_VERSION, value: ""}
          {{- include "coterie.s3Variables" . | nindent 10 }}
        resources: {{ toYaml .Values.predictor.resources | nindent 10 }}
        securityContext: {{ include "coterie.containerSecurity" . | nindent 10 }}
        volumeMounts:
          - {name: bundle, mountPath: /mnt/models}
          - {name: tmp, mountPath: /tmp}
    containers:
      - name: kserve-container
        image: {{ .Values.images.predictor }}
        imagePullPolicy: IfNotPresent
        args: [--bundle, /mnt/models, --model_name, coterie, --http_port, "8080", --grpc_port, "8081"]
        env:
          {{- include "coterie.serverVariables" (list . "predictor") | nindent 10 }}
          - {name: OMP_NUM_THREADS, value: {{ .Values.predictor.threads | quote }}}
        {{- include "coterie.server" (list . "predictor") | nindent 8 }}
        volumeMounts:
          - {name: bundle, mountPath: /mnt/models}
          - {name: tmp, mountPath: /tmp}
    volumes:
      - name: bundle
        emptyDir: {sizeLimit: {{ .Values.predictor.storage }}}
      - name: tmp
        emptyDir: {sizeLimit: {{ .Values.predictor.storage }}}
  transformer:
    {{- include "coterie.component" (list . "router") | nindent 4 }}
    initContainers:
      - name: fetch
        image: {{ .Values.images.router }}
        imagePullPolicy: IfNotPresent
        command: [python3, -m, serving.fetch, profiles]
        env:
          - {name: COTERIE_PROFILES, value: ""}
          {{- include "coterie.s3Variables" . | nindent 10 }}
        resources: {{ toYaml .Values.router.resources | nindent 10 }}
        securityContext: {{ include "coterie.containerSecurity" . | nindent 10 }}
        volumeMounts:
          - {name: profiles, mountPath: /mnt/profiles}
          - {name: tmp, mountPath: /tmp}
    containers:
      - name: kserve-container
        image: {{ .Values.images.router }}
        imagePullPolicy: IfNotPresent
        args: [--profiles, /mnt/profiles, --model_name, coterie, --http_port, "8080", --grpc_port, "8081"]
        env:
          {{- include "coterie.serverVariables" (list . "router") | nindent 10 }}
          - {name: OMP_NUM_THREADS, value: "1"}
          - {name: COTERIE_FEEDBACK, value: {{ .Values.feedback.enabled | quote }}}
          - {name: COTERIE_FEEDBACK_DAILY_CAP, value: {{ include "coterie.number" .Values.feedback.dailyCap | quote }}}
          - {name: COTERIE_FEEDBACK_HOLDOUT, value: {{ include "coterie.number" .Values.feedback.holdout | quote }}}
          {{- include "coterie.secretVariable" (list (include "coterie.pseudonymSecret" .) "COTERIE_PSEUDONYM_KEY" false) | nindent 10 }}
          {{- range list "COTERIE_REDIS" "COTERIE_FEEDBACK_DATABASE" "PGPASSWORD" }}
          {{- include "coterie.secretVariable" (list (include "coterie.storesSecret" $) . true) | nindent 10 }}
          {{- end }}
        {{- include "coterie.server" (list . "router") | nindent 8 }}
        volumeMounts:
          - {name: profiles, mountPath: /mnt/profiles}
          - {name: tmp, mountPath: /tmp}
          {{- if hasPrefix "sqlite:" (include "coterie.database" .) }}
          - {name: feedback, mountPath: /var/lib/coterie}
          {{- end }}
    volumes:
      - {name: profiles, emptyDir: {sizeLimit: 10Gi}}
      - {name: tmp, emptyDir: {sizeLimit: 10Gi}}
      {{- if hasPrefix "sqlite:" (include "coterie.database" .) }}
      - {name: feedback, persistentVolumeClaim: {claimName: {{ .Release.Name }}-feedback}}
      {{- end }}
{{- end }}

{{/* What predictor and transformer have in common: (list $ "router"). */}}
{{- define "coterie.component" -}}
{{- $root := index . 0 -}}
{{- $of := get $root.Values (index . 1) -}}
labels:
  app.kubernetes.io/component: {{ index . 1 }}
annotations:
  serving.kserve.io/autoscalerClass: {{ ternary "hpa" "none" $of.autoscaling.enabled }}
  {{- if eq (index . 1) "router" }}
  # The environment is read at the start: other passwords mean other pods.
  coterie.dev/secrets: {{ printf "%s %s" (include "coterie.stores" $root) $root.Values.generated.key | sha256sum | trunc 16 | quote }}
  {{- end }}
  {{- with $of.podAnnotations }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
minReplicas: {{ $of.replicas }}
maxReplicas: {{ ternary $of.autoscaling.maxReplicas $of.replicas $of.autoscaling.enabled }}
{{- if $of.autoscaling.enabled }}
scaleMetric: cpu
scaleTarget: {{ $of.autoscaling.targetCPU }}
{{- end }}
{{- if and (eq (index . 1) "router") (hasPrefix "sqlite:" (include "coterie.database" $root)) }}
deploymentStrategy: {type: Recreate} # two routers at once must not write to one SQLite file
{{- else }}
deploymentStrategy:
  type: RollingUpdate
  rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
{{- end }}
serviceAccountName: {{ $root.Release.Name }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add 15 (get $of.settings "grace_seconds" | default 30) }}
securityContext: {{ include "coterie.podSecurity" 10001 | nindent 2 }}
{{- include "coterie.pullSecrets" $root }}
{{- include "coterie.nodes" $of }}
{{- with $of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- if $of.affinity }}
affinity: {{ toYaml $of.affinity | nindent 2 }}
{{- else }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector: {matchLabels: {{ include "coterie.selector" (list $root (index . 1)) | fromYaml | toJson }}}
{{- end }}
{{- end }}

{{/* Environment of either server. */}}
{{- define "coterie.serverVariables" -}}
{{- $root := index . 0 -}}
- {name: HOME, value: /tmp}
{{- include "coterie.settings" (get $root.Values (index . 1)).settings }}
{{- include "coterie.tokenVariable" $root }}
{{- end }}

{{/* Ports, probes, resources, and how either server ends. */}}
{{- define "coterie.server" -}}
{{- $root := index . 0 -}}
{{- $of := get $root.Values (index . 1) -}}
ports:
  - {name: http, containerPort: 8080, protocol: TCP}
  - {name: grpc, containerPort: 8081, protocol: TCP}
{{- if eq (index . 1) "predictor" }}
startupProbe: # golden scores came out right
  httpGet: {path: /v2/models/coterie/ready, port: 8080}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: {{ div (add 1 $of.startupSeconds) 2 }}
{{- else }}
startupProbe: # it lives; a router that waits for its predictor is not to be killed for it
  httpGet: {path: /v2/health/live, port: 8080}
  periodSeconds: 2
  timeoutSeconds: 5
  failureThreshold: 60
{{- end }}
readinessProbe:
  httpGet: {path: /v2/models/coterie/ready, port: 8080}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /v2/health/live, port: 8080}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
lifecycle: # requests come until every proxy has heard that the pod goes; from the signal on connections end with answers
  preStop: {exec: {command: [sh, -c, "kill -USR1 1; sleep 8"]}}
resources:
  {{- $resources := deepCopy $of.resources }}
  {{- if and (eq (index . 1) "predictor") $of.gpus }}
  {{- $_ := set $resources "limits" (set ($resources.limits | default dict) $of.gpuResource $of.gpus) }}
  {{- $_ := set $resources "requests" (set ($resources.requests | default dict) $of.gpuResource $of.gpus) }}
  {{- end }}
  {{- toYaml $resources | nindent 2 }}
securityContext: {{ include "coterie.containerSecurity" $root | nindent 2 }}
{{- end }}

{{/* Not empty where the release serves already; a cluster that does not know the kind cannot be asked. */}}
{{- define "coterie.serves" -}}
{{- if .Capabilities.APIVersions.Has "serving.kserve.io/v1beta1/InferenceService" -}}
{{- if lookup "serving.kserve.io/v1beta1" "InferenceService" .Release.Namespace .Release.Name }}yes{{ end -}}
{{- end -}}
{{- end }}
