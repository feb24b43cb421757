{{/* A store of one pod and one volume, which stays: (list $ "redis" PORT CONTAINER), where CONTAINER is YAML. */}}
{{- define "coterie.store" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $of := get $root.Values $name -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $root.Release.Name }}-{{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels: {{ include "coterie.labels" (list $root $name) | nindent 4 }}
spec:
  selector: {{ include "coterie.selector" (list $root $name) | nindent 4 }}
  ports:
    - {name: tcp-{{ $name }}, port: {{ index . 2 }}, targetPort: store}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $root.Release.Name }}-{{ $name }}
  namespace: {{ $root.Release.Namespace }}
  labels: {{ include "coterie.labels" (list $root $name) | nindent 4 }}
spec:
  serviceName: {{ $root.Release.Name }}-{{ $name }}
  replicas: 1
  selector: {matchLabels: {{ include "coterie.selector" (list $root $name) | fromYaml | toJson }}}
  persistentVolumeClaimRetentionPolicy: {whenDeleted: Retain, whenScaled: Retain}
  template:
    metadata:
      labels: {{ include "coterie.selector" (list $root $name) | nindent 8 }}
    spec:
      automountServiceAccountToken: false
      enableServiceLinks: false
      terminationGracePeriodSeconds: 60
      securityContext: {{ include "coterie.podSecurity" $of.user | nindent 8 }}
      {{- include "coterie.pullSecrets" $root | nindent 6 }}
      {{- include "coterie.nodes" $of | nindent 6 }}
      containers:
        - name: {{ $name }}
          image: {{ $of.image }}
          imagePullPolicy: IfNotPresent
          {{- index . 3 | nindent 10 }}
          ports:
            - {name: store, containerPort: {{ index . 2 }}}
          resources: {{ toYaml $of.resources | nindent 12 }}
          securityContext: {{ include "coterie.containerSecurity" $root | nindent 12 }}
      volumes:
        - {name: tmp, emptyDir: {}}
  volumeClaimTemplates:
    - metadata:
        name: data
        labels: {{ include "coterie.selector" (list $root $name) | nindent 10 }}
      spec:
        accessModes: [ReadWriteOnce]
        {{- with $of.storage.class }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ $of.storage.size }}}}
{{- end }}

{{- define "coterie.redisContainer" -}}
{{- /* The password goes into a file, where other processes' lists do not show it. */ -}}
command:
  - sh
  - -c
  - |
    umask 077
    printf 'requirepass %s\n' "$REDIS_PASSWORD" > /tmp/redis.conf
    exec redis-server /tmp/redis.conf --dir /data --appendonly yes --appendfsync everysec --save '' \
      --maxmemory {{ .Values.redis.maxMemory }} --maxmemory-policy noeviction
env:
  {{- include "coterie.secretVariable" (list (include "coterie.storesSecret" .) "REDIS_PASSWORD" false) | nindent 2 }}
  - name: REDISCLI_AUTH
    valueFrom: {secretKeyRef: {name: {{ include "coterie.storesSecret" . }}, key: REDIS_PASSWORD}}
readinessProbe:
  exec: {command: [sh, -c, "redis-cli ping | grep -q PONG"]}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  tcpSocket: {port: store}
  initialDelaySeconds: 30
  periodSeconds: 10
  failureThreshold: 6
volumeMounts:
  - {name: data, mountPath: /data}
  - {name: tmp, mountPath: /tmp}
{{- end }}

{{- define "coterie.postgresqlContainer" -}}
args: [-c, fsync=on, -c, synchronous_commit=on]
env:
  - {name: POSTGRES_USER, value: coterie}
  - {name: POSTGRES_DB, value: coterie}
  - {name: PGDATA, value: /var/lib/postgresql/data/pgdata}
  - name: POSTGRES_PASSWORD
    valueFrom: {secretKeyRef: {name: {{ include "coterie.storesSecret" . }}, key: {{ ternary "PGPASSWORD" "POSTGRESQL_PASSWORD" (ne .Values.stores.existingSecret "") }}}}
readinessProbe:
  exec: {command: [pg_isready, -q, -h, 127.0.0.1, -U, coterie, -d, coterie]}
  periodSeconds: 5
  timeoutSeconds: 3
livenessProbe:
  tcpSocket: {port: store}
  initialDelaySeconds: 60
  periodSeconds: 10
  failureThreshold: 6
volumeMounts:
  - {name: data, mountPath: /var/lib/postgresql/data}
  - {name: tmp, mountPath: /tmp}
  - {name: tmp, mountPath: /var/run/postgresql}
{{- end }}
